"""What is run by hand, or by make: set-up, models, peers, frameworks, manual pages."""
