"""The simulator: discrete events in place of time, sockets and models; the decisions are the live ones."""
