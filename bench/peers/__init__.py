"""The systems that medshard is compared with, each started by its own users' rules in a virtual environment of its own."""
