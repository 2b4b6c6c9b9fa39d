"""The HTTP door: one module a resource, and what they share."""
