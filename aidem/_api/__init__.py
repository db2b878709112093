"""The async front: decorators, the block, and the execution that a body sees."""
