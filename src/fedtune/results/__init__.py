"""What a run leaves behind: who made it, its scores, and how sure they are. No torch here."""
