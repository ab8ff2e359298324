"make_shop.py"
