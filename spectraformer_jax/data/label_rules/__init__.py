"""Simple rules and models that predict labels: what a result must beat."""
