"""What runs composed models whose adapters stay beside the weights; every file here can be copied and used alone."""
