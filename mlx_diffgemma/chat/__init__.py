"""Chat: reads the markup of replies, and keeps the turns of a user and a model."""
