"""The models room: brings base models onto this host, checks and describes them. It trains nothing."""
