"""What records mean.

``alerts`` (bytes or records in), ``files`` (alerts in files), ``tables`` (tables of candidates, in and out),
``packets`` (what is published, with its stamps), ``rejects`` (dead letters), ``schema`` (the Avro schemas of schemas/).
"""
