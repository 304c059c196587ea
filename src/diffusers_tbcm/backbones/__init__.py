"""stub"""


def find_backbone(folder):
    from .sana import Sana

    return Sana()
