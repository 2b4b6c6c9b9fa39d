"""One repository a resource: rows in, domain words out. They flush and never commit; the unit does."""
