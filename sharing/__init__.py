"""What push_to_hub.py does: looks into a folder, writes its card, loads it as a stranger would, sends it."""
