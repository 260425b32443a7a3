"""The one home of code that relies on Pyro's and torch's private names."""
