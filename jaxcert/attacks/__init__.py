"""Attacks: inputs on which a model breaks a property."""
