"""Numbers about a network's geometry in input space; nothing here changes a model."""
