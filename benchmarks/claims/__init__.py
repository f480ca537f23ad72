"""The paper's claims at small scale: real data, several seeds, rules fixed beforehand.

claims, claims.yaml     the claims: conditions, rules and texts
minilm                  the claim on a text model that people use
conditions              training of a condition, in phases
datasets, collection    the data
sources                 the data from the Hub
rules                   comparisons and verdicts
runner, seed            claims with all seeds, in one process or several
page                    the page with the verdicts
"""
