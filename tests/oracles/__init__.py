"""Closed forms that the methods must reach, and a way to run a method's own updates against them."""
