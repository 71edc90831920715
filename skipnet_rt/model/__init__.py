"""What a SkipNet is: its architecture, the trainable network, its weights as engines take them, what it counts."""
