"""One repository per resource. A repository flushes and never commits; the unit of work commits."""
