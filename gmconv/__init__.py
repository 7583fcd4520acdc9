"""GMConv: the layer as it was trained, and the surgery that removes it."""
