"""What a SkipNet is: its architecture, the trainable network, its weights as engines take them, what it costs.

Nothing here executes a packed network, reads a file or looks at the machine.
"""
