"""What a dataset is: its schema, its files, its statistics and checks, and the card that describes it."""
