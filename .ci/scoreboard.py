"Prints the scoreboard: every recorded claim with the paper's value, ours and the verdict."
import os

from pages import ROOT

from fairbook.ledger import scoreboard

os.chdir(ROOT)
board = scoreboard()
if len(board): print("\n" + board[["chapter", "claim", "paper", "ours", "tol", "verdict"]].to_string(index=False, float_format="{:.4g}".format))
print("\nscoreboard: " + (", ".join(f"{n} {verdict}" for verdict, n in board.verdict.value_counts().items()) or "no claim is recorded yet"))
