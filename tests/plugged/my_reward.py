"""A reward for short texts."""


def brevity(completions, **columns):
    return [-0.1 * len(text.split()) for text in completions]
