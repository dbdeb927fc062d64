"""`fastvit doctor`: checks of the machine, its software, its data and its network, before a run or when one is odd."""
