"""The report: one HTML file that explains a results folder without a network, a server or blemish itself."""
