"""The paper's claims and ours at small scale: real data, several seeds, rules fixed beforehand.

claims, claims.yaml         the list of claims, and their texts
minilm, minilm_negatives    conditions and rules on a text model that people use
small_towers                those on towers from nothing
batching                    both tasks or one in a step, and pairs that share an id
pretraining                 how the text tower is initialised
languages, switches         search in other languages; temperature, reduction, Matryoshka
conditions                  training of a condition, in phases
datasets, collection        the data
near_duplicates             captions and those that are nearly equal
sources                     the data from the Hub
rules                       comparisons and verdicts
runner, seed                claims with all seeds, in one process or several
page                        the page with the verdicts
"""
