"""What goes around any method: drift correction, robust weights, server optimisers, scripted attackers."""
