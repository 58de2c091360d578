"""Penalties: what training keeps small besides the loss, each a plug-in of `flexure.fit`."""
