"""The HTTP API: one module for each resource, and the parts that they share."""
