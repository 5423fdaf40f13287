"""Owns how text that models wrote is made safe to look at: what can't be seen is named instead of obeyed.

A direction override makes a verdict read backwards, a zero-width character hides half a word. serve/report.js does the
same for the texts that it shows.
"""

from __future__ import annotations

import re

# Controls but tab and line feed, formats (directions, joiners), surrogates, private use, line separators; and what
# Unicode calls ignorable though it is a letter or a mark: fillers, variation selectors, combining joiners.
_HIDDEN = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ue000-\uf8ff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)


def visible(text: str) -> str:
    """Return the text with every control, direction mark or other invisible character written as its code point.

    >>> visible("12\\u202e34")
    '12⟨U+202E⟩34'
    """
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
