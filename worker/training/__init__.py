"""The training room: one child process, one work order, one adapter. No jobs, no database, no network."""
