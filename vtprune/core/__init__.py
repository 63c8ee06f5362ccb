"""The ground floor: what a method sees, answers and is asked, in torch alone.

Nothing here knows a model. An engine that holds its own visual features needs this package, the methods and no more.
"""
