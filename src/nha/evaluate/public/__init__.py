"""Public test sets from a directory: multiple choice, last words, written answers, verbatim recall, needles."""
