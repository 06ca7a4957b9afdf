"""What the site is made with: Sphinx extensions of its own, and its pictures."""
