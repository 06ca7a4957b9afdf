"""Small studies, each a script of its own; examples/common.py is what they share."""
