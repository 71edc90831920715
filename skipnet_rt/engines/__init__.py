"""What executes a network. `registry` lists the engines, `base` says what one is; nothing here measures or trains."""
