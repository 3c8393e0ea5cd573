"""Commands for operators. They send HTTP requests to a running gateway and print the answers as text or JSON."""
