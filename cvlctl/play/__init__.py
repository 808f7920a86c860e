"""Environments and policies: whole episodes, in this process or in workers."""
