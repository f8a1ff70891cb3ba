"""What the client and the node must agree on, byte for byte. Pure: no clock, disk, socket, key store or log."""
