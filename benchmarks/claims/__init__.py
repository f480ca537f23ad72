"""The paper's claims at small scale: small towers from scratch, real data, several seeds, rules fixed beforehand.

claims, claims.yaml     the claims: conditions, rules and texts
conditions              training of a condition, in phases
datasets, sources       the data, and where it comes from
rules                   comparisons and verdicts
runner, seed            claims with all seeds, in one process or several
page                    the page with the verdicts
"""
