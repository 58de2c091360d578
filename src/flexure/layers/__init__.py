"""What is known of linear layers: bounds on their norms."""
