"""Chat templates, rendered within limits on work, memory, output and time.

A template comes with a checkpoint, from strangers. transformers renders it in Jinja's sandbox, which keeps it from files but not
from endless loops and gigabytes of text. Here everything that can take long pays before it runs: each turn of a loop and each
call of a macro, by its size; each call of a method or filter, by what it reads; each text and list, by what is made. A template
may spend a budget, and more for each character of the conversation (meter.py). The conversation alone pays for an ordinary
template, which renders exactly what transformers renders.

Jinja parses the template, rendering.py puts the payments into its syntax tree, and Jinja compiles the tree. What a template can
call is in the lists of language.py.
"""
