"""The board: submissions packed, validated, and turned into one static page. No torch here."""
