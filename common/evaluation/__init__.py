"""What all evaluators share: bootstrap intervals, plots, the HTML report."""
