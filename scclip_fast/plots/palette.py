"""The colours of classes.

The first seven are those of Okabe and Ito, less black, then Paul Tol's indigo and wine: people who
are colour-blind can tell them apart. Then follow a grey and the colours that are farthest in OKLab
(Ottosson, 2020) from all before them, among a 17 x 17 x 17 grid of sRGB without the dull (chroma
0.06 and less), dark and bright ones (lightness outside 0.35 to 0.93), as white is for outlines.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_COLORS = """
0072b2 e69f00 009e73 cc79a7 56b4e9 d55e00 f0e442 332288 882255 999999 005000 9f00ff
ffcfff 40ffef 00df00 0000ff ff10ef cf008f 805000 8f80ff ff8fff 7040af 80cf8f ff0050
ff9f9f bf0010 8f6080 8f8000 4060ff 005070 307050 80ff80 70af00 701000 bfafef 6000ef
ffcf9f bf50df 108fef 503050 2040bf ff50af 9fdfff 700080 9f009f ff7060 008f00 afcf00
bfefaf 7080af 504010 cf5070 00bfaf 8f60bf bfaf80 605080 309faf 0000bf cf80ef 00dfef
9f8fcf af7060 00efaf ffbf30 30ff00 6000af 8050ef af3060 af9f00 704040 80af70 007000
cf8f80 cf00ff ff80bf 9f5040 cfcf80 00cf70 bf8010 8000cf df30bf 408080 ff4000 607000
af40af af00cf 8f2020 ef60ff 8f4080 ff8000 bfff00 6060af 809fff ffafdf 105040 80bfbf
00408f 700040 4000cf af609f 6070df ef1080 df2000 3040ef 708f60 ffaf70 807040 502070
8fdfcf 3060cf af70cf df60cf 20ef70 af6000 cf9fbf ef6080 40509f 9f60ff 8fbfff 00bf00
60308f afbf60 9f0070 ffbfbf 9f8f60 cfcfff 00af50 206060 404070 8fef10 cf0050 bf4000
af808f 608f20 10608f 80ffbf 606030 afdf70 ff00af 9f40df 5040cf 805060 70cf30 6040ff
ff70df 80209f 106030 df509f 508050 708fdf 703070 ffdf80 8000ff 008fbf cf7070 df40ef
50708f 50008f dfaf9f ef808f 709fbf dfcf00 df8f50 603020 007080 70af9f af8fff bf00af
8f30bf df9fff 3000af afefdf bf4080 604060 6080ff 80509f 50cfff 10cf9f 809f40 80bf50
ff8f70 bf4050 60df80 208030 405000 40af80 704010 4080cf 40dfbf 309fdf 9f1040 8f70df
60efff 8f4020 df8fcf bfef50 cf60ff df5040 8fcfdf cf00cf 5030af ff40cf 70608f 00afcf
409f00 00cfcf bf9f50 7050cf 4000ff af208f df3050 af40ff dfdfaf 700060 0030df 7030df
bf0070 8f709f 8fafdf dfaf60 00809f 9fdf9f 004060 9fbf8f ef7030 af6070 9f80af 7070bf
709f80 8f6000 dfbf8f bf8060 00ff9f 0030af cfaf00 ff4080 6000cf 801030 9f508f afff9f
bf8fdf 80ef8f 509f50 208f50 0060af af9fcf bf8faf 8f8050 ef9fbf 605000 508f80 70408f
9f8f00 0070ef 8fdf50 409fff
"""


@cache
def palette() -> np.ndarray:
    """Returns the colours of class 0, 1, ..., as uint8 of shape (256, 3)."""
    return np.frombuffer(bytes.fromhex(_COLORS), np.uint8).reshape(-1, 3)


def colors(classes: np.ndarray) -> np.ndarray:
    """Returns the colours (..., 3), uint8, of classes (...), which repeat after 256 classes."""
    return palette().take(classes, axis=0, mode="wrap")
