"""What goes over the sockets between processes: frames, messages, pickles."""
