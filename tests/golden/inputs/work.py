"""A function of a user's."""


def process(row):
    return {"length": len(row["text"])}
