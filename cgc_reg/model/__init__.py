"""Everything that touches a user's model."""
