"""What a teacher is asked beyond the prompt that a student is trained on."""

REASONS = (
    "\n\nFirst explain in a few sentences what speaks for your answer. Then write a line that begins with "
    '"Answer:" and after it the answer alone, in the form asked for above.'
)
REASON_REQUEST = "\n\nExplain in a few sentences what speaks for your answer."  # what a student's rationale answers
AGAIN = "That cannot be used: {fault}. Answer again, in the form asked for."
RANK = (
    "Here is a task, and {count} answers to it.\n\nTask:\n{prompt}\n\n{answers}\n\n"
    "Which answer is the best, and which the worst? Reply with two lines and nothing else:\n"
    "Best: NUMBER\nWorst: NUMBER"
)
