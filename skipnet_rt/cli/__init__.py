"""The command line. It parses, calls the rooms below and prints; nothing is computed here."""
