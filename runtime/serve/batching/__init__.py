"""The queue of a model version, fair between clients, and the engines that empty it."""
